"""The one training loop: settings, state and step, run, logs, memory."""
