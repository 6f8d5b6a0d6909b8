"""Tables over ranks: process group, plan, initial weights."""
