"""Checkpoints that cannot lie: committed whole or not at all, verified before they are used."""
