"""What `onecurve check-gpu` does: whether this framework is right and fast on this machine's GPU, section by section."""
