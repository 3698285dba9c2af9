"""A system by its name: adapters, a router and a composition that answer together.

One file a kind builds it from its entry in params.yaml and its folders; `load` knows which.
"""
