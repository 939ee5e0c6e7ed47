"""Serving: the gate that decides which checkpoints may answer, the OpenAI-compatible routes, and the decoding engine. No ray in here."""
