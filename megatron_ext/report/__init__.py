"""The results of a resume: plain data, log lines, JSON, files, the page and scalars."""
