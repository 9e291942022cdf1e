"""HTTP: protocol, validation, routes, errors, metrics. Asyncio alone; neither torch nor transformers is ever imported."""
