module example.com/raft/bench

go 1.26

require example.com/raft v0.0.0

replace example.com/raft => ../
