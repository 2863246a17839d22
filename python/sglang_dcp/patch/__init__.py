"""The patch series for forks of SGLang: put in place, taken back, made and checked."""
