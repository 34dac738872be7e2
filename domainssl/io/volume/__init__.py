"""CT, MR and PET volumes: files of any common format as arrays in RAS axis order."""
