"""The web page: options, what it computes (studio, edits), how it looks (page), and the server (launch)."""
