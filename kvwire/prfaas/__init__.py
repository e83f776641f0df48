"""Prefill as a service: long prefills go to another cluster, their cache comes back by kvwire.

The throughput model and its plans, the router, the scheduler, the prefix-cache pool and the
simulator of arXiv 2604.15039, and what that paper leaves open. README.md here is the design.
Each name lives in its module; nothing is imported before it is asked for.
"""
