module example.com/raft/contrib

go 1.26

require (
	example.com/raft v0.0.0
	go.etcd.io/bbolt v1.5.0
)

require golang.org/x/sys v0.45.0 // indirect

replace example.com/raft => ../
