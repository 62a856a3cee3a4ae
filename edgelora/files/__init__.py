"""Files: bounded readers for what strangers hand us, atomic writers for what we hand out."""
