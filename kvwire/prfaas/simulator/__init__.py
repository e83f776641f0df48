"""A deployment, request by request, from a trace: clusters, link, pools, policies, faults."""
