"""The tool for the patch series for forks of SGLang."""
