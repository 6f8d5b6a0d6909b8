"""What is claimed about speed and about real data, as programs that print JSON."""
