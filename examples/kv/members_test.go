package main

import (
	"fmt"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"example.com/raft"
)

// console is the page's port, which outlives all nodes.
type console struct {
	*testing.T
	c    *Cluster
	web  *client
	base string
}

func newConsole(t *testing.T, c *Cluster, web *client) *console {
	s := httptest.NewServer(newPage(c, nil, true))
	t.Cleanup(s.Close)
	return &console{t, c, web, s.URL}
}

// post presses a button, which has to be answered with code and text. On a slow
// machine there may be no leader for a moment; then nothing was done.
func (o *console) post(code int, path, text string) {
	o.Helper()
	var r reply
	eventually(o.T, "an answer to "+path, func() (ok bool) {
		var err error
		if r, err = o.web.try("POST", o.base+path, ""); err != nil {
			o.Fatal(err)
		}
		return r.code != 503 || code == 503
	})
	if r.code != code || !strings.Contains(r.body, text) {
		o.Errorf("POST %s: %d %q, want %d %q", path, r.code, r.body, code, text)
	}
}

func (o *console) node(id string) nodeState {
	o.Helper()
	s, err := o.web.status(o.base)
	if err != nil {
		o.Fatal(err)
	}
	for _, n := range s.Nodes {
		if string(n.ID) == id {
			return n
		}
	}
	o.Fatalf("no node %s in the status", id)
	return nodeState{}
}

// members returns what the page shows of each node.
func (o *console) members() string {
	o.Helper()
	s, err := o.web.status(o.base)
	if err != nil {
		o.Fatal(err)
	}
	var all []string
	for _, n := range s.Nodes {
		all = append(all, string(n.ID)+" "+n.Member)
	}
	return strings.Join(all, ", ")
}

func (o *console) expect(want string) {
	o.Helper()
	eventually(o.T, "members: "+want, func() bool { return o.members() == want })
}

// reads checks that a node has what was written, on its own port.
func (o *console) reads(id, key, value string) {
	o.Helper()
	if r := o.web.must(o.T, 200, "GET", o.c.node(id).url()+"/kv/"+key, ""); r.body != value {
		o.Errorf("node %s reads %q, want %q", id, r.body, value)
	}
}

// A cluster grows from three nodes to seven and shrinks to one, by button.
func TestMembers(t *testing.T) {
	checkLeaks(t)
	web := newClient(t)
	c := startCluster(t, t.TempDir(), freePorts(t, 2*maxNodes), requestTimeout)
	c.leader(t)
	o := newConsole(t, c, web)
	o.expect("a voter, b voter, c voter")
	web.must(t, 201, "PUT", c.Nodes()[0].url()+"/kv/large", strings.Repeat("v", 2*keepLog))
	web.must(t, 201, "PUT", c.Nodes()[0].url()+"/kv/before", "snapshot")
	for _, id := range []string{"a", "b", "c"} {
		eventually(t, "a snapshot to replace the log of "+id, func() bool {
			o.post(200, "/nodes/"+id+"/snapshot", "a snapshot up to entry")
			n := o.node(id)
			return n.Snapshot > 1 && n.First > 1 && n.First <= n.Snapshot+1
		})
	}

	o.post(400, "/nodes?as=king", "as=voter or as=learner")
	o.post(201, "/nodes", "node d is a voter")
	o.reads("d", "before", "snapshot")
	if n := o.node("d"); n.Snapshot == 0 || n.First <= 1 {
		t.Errorf("node d has not come by its state in a snapshot: %+v", n)
	}
	o.post(409, "/nodes/d/learner", "is a member already")
	o.post(201, "/nodes?as=learner", "node e is a learner")
	o.expect("a voter, b voter, c voter, d voter, e learner")
	o.post(409, "/nodes/e/lead", "Only a voter can lead")
	o.post(200, "/nodes/e/voter", "node e is a voter")
	o.post(200, "/nodes/d/lead", "leadership")
	eventually(t, "d to lead", func() bool { return o.node("d").Role == "Leader" })
	o.post(200, "/nodes/d/lead", "leadership") // it does already
	o.post(201, "/nodes?as=learner", "node f is")
	o.post(201, "/nodes?as=learner", "node g is")
	o.post(409, "/nodes", fmt.Sprintf("at most %d nodes", maxNodes))

	t.Run("remove and add again", func(t *testing.T) { removeAndAddAgain(o) })
	t.Run("remove all", func(t *testing.T) { removeAll(o) })
}

// removeAndAddAgain goes on where d leads a, b, c, e and the learners f and g.
func removeAndAddAgain(o *console) {
	o.post(204, "/nodes/e/kill", "")
	o.post(409, "/nodes/e/lead", "not transferred")
	o.post(409, "/nodes/e/snapshot", "not running")
	o.post(200, "/nodes/e/remove", "is removed and stopped")
	o.post(200, "/nodes/f/remove", "is removed and stopped")
	o.post(200, "/nodes/b/remove", "is removed and stopped")
	o.expect("a voter, b removed, c voter, d voter, e removed, f removed, g learner")
	if n := o.node("f"); n.Running || n.Error != "" {
		o.Errorf("node f after its removal: %+v", n)
	}
	o.post(409, "/nodes/f/restart", "add it again")
	o.post(409, "/nodes/f/remove", "not a member")
	o.post(409, "/nodes/f/lead", "not a voter")

	o.post(200, "/nodes/f/voter", "node f is a voter")
	o.post(200, "/nodes/b/learner", "node b is a learner")
	o.expect("a voter, b learner, c voter, d voter, e removed, f voter, g learner")
	o.reads("f", "before", "snapshot")
	o.reads("b", "before", "snapshot")
	o.post(200, "/nodes/d/remove", "is removed and stopped") // the leader
	eventually(o.T, "another leader", func() bool {
		r, err := o.web.try("PUT", o.base+"/nodes/a/kv/after", "the leader left")
		return err == nil && r.code < 300
	})
	o.expect("a voter, b learner, c voter, d removed, e removed, f voter, g learner")
	o.reads("g", "after", "the leader left")
}

// removeAll goes on where a, c and f are the voters.
func removeAll(o *console) {
	for _, id := range []string{"f", "a"} {
		eventually(o.T, id+" to be removed", func() bool { // if it leads, the others need a moment
			r, err := o.web.try("POST", o.base+"/nodes/"+id+"/remove", "")
			return err == nil && r.code == 200 || strings.HasSuffix(o.node(id).Member, "removed")
		})
	}
	eventually(o.T, "c to lead", func() bool { return o.node("c").Role == "Leader" })
	eventually(o.T, "the last voter to be refused", func() bool {
		r, err := o.web.try("POST", o.base+"/nodes/c/remove", "")
		return err == nil && r.code == 409 && strings.Contains(r.body, "no voter would be left; add one first")
	})
	o.post(200, "/nodes/b/voter", "node b is a voter")
	o.reads("b", "after", "the leader left")
}

// A change that can't be finished does not block the page for ever: it is
// finished when it can be, or taken back. A node that is refused leaves nothing.
func TestMembersUnfinished(t *testing.T) {
	checkLeaks(t)
	dir := t.TempDir()
	c := startCluster(t, dir, freePorts(t, 2*maxNodes), requestTimeout)
	c.leader(t)
	c.timeout = 300 * time.Millisecond
	o := newConsole(t, c, newClient(t))
	for range 2 { // d and e
		n := c.unusedNode()
		n.gate.setCut(true)
		if err := n.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		c.insert(n)
	}
	o.expect("a voter, b voter, c voter, d none, e none")
	o.post(504, "/nodes/d/voter", "take the change back with Remove")
	o.expect("a voter, b voter, c voter, d learner, e none")
	o.post(204, "/nodes/d/heal", "")
	o.expect("a voter, b voter, c voter, d voter, e none")
	o.post(504, "/nodes/e/voter", "has not caught up")
	o.expect("a voter, b voter, c voter, d voter, e learner")

	c.timeout = actionTimeout
	o.post(200, "/nodes/e/remove", "is removed and stopped")
	leader, err := c.leading()
	if err != nil {
		t.Fatal(err)
	}
	if err := leader.AddLearner(t.Context(), raft.Member{ID: "elsewhere", Addr: c.unusedNode().Listen}); err != nil {
		t.Fatal(err)
	}
	o.post(409, "/nodes", "another member has its address")
	if left := glob(t, dir, "f*"); len(left) > 0 {
		t.Errorf("a node that was refused left %v", left)
	}
	o.expect("a voter, b voter, c voter, d voter, e removed")
	if !c.changing.TryLock() {
		t.Fatal("a change still runs")
	}
	o.post(409, "/nodes", "another change of the membership is running")
	c.changing.Unlock()

	for _, n := range c.Nodes()[1:] {
		n.SetPartitioned(true)
	}
	eventually(t, "the leader to resign", func() bool { _, err := c.leading(); return err != nil })
	o.post(503, "/nodes", "no node leads")
	o.post(503, "/nodes/a/lead", "no node leads")
}

// With -dir nodes that were added are there again, and removed ones are not.
func TestDemoKeepsItsMembers(t *testing.T) {
	checkLeaks(t)
	web := newClient(t)
	dir, port := t.TempDir(), freePorts(t, 1+2*maxNodes)
	base := fmt.Sprintf("http://127.0.0.1:%d", port)
	o := &console{t, nil, web, base}
	code, out := runDemoOn(t, web, dir, port, func() {
		o.post(201, "/nodes", "node d is a voter")
		o.post(201, "/nodes?as=learner", "node e is a learner")
		o.post(200, "/nodes/d/lead", "leadership")
		o.post(200, "/nodes/a/remove", filepath.Join(dir, "a.removed"))
		web.must(t, 201, "PUT", base+"/nodes/d/kv/kept", "still here")
	})
	if code != 0 || !strings.Contains(out, "3 nodes run") {
		t.Errorf("exit code %d, %s", code, out)
	}
	code, out = runDemoOn(t, web, dir, port, func() {
		o.expect("a removed, b voter, c voter, d voter, e learner")
		if n := o.node("a"); n.Running || !n.Here {
			t.Errorf("the removed node: %+v", n)
		}
		for _, id := range []string{"b", "d", "e"} {
			if r := web.must(t, 200, "GET", base+"/nodes/"+id+"/kv/kept", ""); r.body != "still here" {
				t.Errorf("after a restart node %s reads %q", id, r.body)
			}
		}
		o.post(200, "/nodes/a/voter", "node a is a voter")
		o.expect("a voter, b voter, c voter, d voter, e learner")
		if r := web.must(t, 200, "GET", base+"/nodes/a/kv/kept", ""); r.body != "still here" {
			t.Errorf("node a reads %q", r.body)
		}
	})
	if code != 0 || !strings.Contains(out, "4 nodes run") || strings.Contains(out, "node a ") {
		t.Errorf("exit code %d, %s", code, out)
	}
	if left := glob(t, dir, "*.removed"); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}
