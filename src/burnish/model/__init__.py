"""The model: loading, adapting, attention that keeps documents apart, and the supervised-only loss."""
