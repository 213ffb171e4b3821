"""What a resume did: plain data first, then lines, JSON, files, a page and scalars."""
