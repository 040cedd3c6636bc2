package raft

import (
	"context"
	"fmt"
	"net"
	"testing"
	"time"
)

type nullMachine struct{}

func (nullMachine) Apply(e Entry) []byte { return e.Data }

func TestSmoke(t *testing.T) {
	var ms []Member
	var ls []net.Listener
	for i := range 3 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		ls = append(ls, l)
		ms = append(ms, Member{ID: NodeID(fmt.Sprint(i)), Addr: l.Addr().String()})
	}
	var ss []*Server
	for i := range 3 {
		s, err := Start(context.Background(), Config{ID: ms[i].ID, ClusterID: "x", StateMachine: nullMachine{}, Dir: t.TempDir(), Bootstrap: ms, Listener: ls[i],
			HeartbeatInterval: 50 * time.Millisecond, ElectionTimeout: 200 * time.Millisecond})
		if err != nil {
			t.Fatal(err)
		}
		ss = append(ss, s)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	for i := range 30 {
		r, err := ss[i%3].Propose(ctx, []byte(fmt.Sprint("cmd", i)))
		if err != nil || string(r.Data) != fmt.Sprint("cmd", i) {
			t.Fatal(i, r, err)
		}
	}
	for _, s := range ss {
		t.Logf("%+v", s.Status())
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
