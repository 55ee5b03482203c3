"""The page of a run: as a file (`epo report`) and live (`epo watch`)."""
