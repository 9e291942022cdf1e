"""HTTP: protocol, validation, routes, errors, metrics. Asyncio alone; torch and transformers are never imported."""
