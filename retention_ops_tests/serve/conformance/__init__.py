"""The official conformance suite against our server: as it is, and with the tools the suite asks for added by the same factory."""
