"""From a recipe to a finished encoder: where a run starts or goes on, its checks, its end."""
