"""The files of the folder that ``chameleon init`` writes."""
