"""What a replay says: its summary, its table, its page."""
