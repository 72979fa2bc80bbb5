"""Other libraries' plug-ins. Each is imported only where its library is; nothing else in the package imports them."""
