"""The network, from embedding tables to logits: single-device code that does not know it is sharded."""
