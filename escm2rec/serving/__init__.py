"""A trained model without its training: mapped into processes of this machine, or exported to serve elsewhere."""
