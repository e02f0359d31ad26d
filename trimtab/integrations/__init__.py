"""Ways into trimtab from other libraries; each imports its library only where it must."""
