"""What a resume will do, decided before anything is changed. Pure."""
