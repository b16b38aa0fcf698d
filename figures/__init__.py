"""Every figure, and the page of a report."""
