"""Example workflows (JSON) for the page's template browser, and the development tool that writes them."""
