"""Progress bars, quiet libraries and pages for people at a terminal or a browser."""
