"""CTR, CTCVR and CVR losses as pure functions of tensors (docs/method.md)."""
