"""The paper's experiments: one training loop, and recipes that say what differs."""
