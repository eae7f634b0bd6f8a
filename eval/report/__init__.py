"""Show results: tables, figures, the HTML page and the Markdown pages of the documentation."""
