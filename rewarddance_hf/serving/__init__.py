"""A judge as a service: server, client, export for other engines. README.md beside this file describes the protocol."""
