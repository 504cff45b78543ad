"""How much memory a run takes: the run itself, on a device that counts what is allocated and computes nothing."""
