"""The config: what may be said (`schema`), how it is read (`load`), what contradicts (`check`)."""
