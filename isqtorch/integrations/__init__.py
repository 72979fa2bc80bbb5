"""Plug-ins for other libraries. Only `isqtorch/__init__.py` and `app` import them, so those libraries are optional."""
