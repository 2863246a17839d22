"""A prefill over a cached prefix that is gathered from all ranks, or stays on them."""
