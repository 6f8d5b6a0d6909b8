"""What a data set holds: counts and distributions, for people and for programs."""
