"""Nothing is hidden that causality, documents and a window do not hide."""

MASK = None
