"""Workers: started or attached, followed, and spoken to."""
