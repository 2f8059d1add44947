"""Progress bars, suppressed library output and HTML pages."""
