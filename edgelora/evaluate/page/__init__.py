"""The report as a page that a person can decide from: HTML, Markdown and a picture, from a Report alone."""
