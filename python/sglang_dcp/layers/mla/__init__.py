"""DeepSeek's attention over a sharded cache of latents."""
