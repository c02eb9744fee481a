"""Files that commands read and write: strict JSON, folders tried first, whole files, locks."""
