"""Arrays to items: which window, which dates, which companions."""
