"""The pages in the browser: data, adapters, routers, asking, runs and models."""
