"""The places where the package meets SGLang: the hook table, hook functions, their proof."""
