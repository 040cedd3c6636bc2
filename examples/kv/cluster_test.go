package main

import (
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"
)

// One cluster of three real nodes, seen through its HTTP ports.
func TestCluster(t *testing.T) {
	checkLeaks(t)
	web := newClient(t)
	c := startCluster(t, t.TempDir(), freePorts(t, 6), requestTimeout)
	c.leader(t)
	t.Run("every node takes every request", func(t *testing.T) { everyNode(t, c, web) })
	t.Run("compare and set", func(t *testing.T) { compareAndSet(t, c, web) })
	t.Run("page", func(t *testing.T) { statusPage(t, c, web) })
	t.Run("kill and restart from the page", func(t *testing.T) { buttons(t, c, web) })
}

func everyNode(t *testing.T, c *Cluster, web *client) {
	for i, n := range c.Nodes() {
		next := c.Nodes()[(i+1)%3]
		key := "/kv/every/" + string(n.ID)
		web.must(t, 404, "GET", n.url()+key, "")
		put := web.must(t, 201, "PUT", n.url()+key, "from "+string(n.ID))
		if put.version() == "" || !strings.HasPrefix(put.body, "version ") {
			t.Errorf("PUT answers with ETag %q and %q", put.version(), put.body)
		}
		get := web.must(t, 200, "GET", next.url()+key, "")
		if get.body != "from "+string(n.ID) || get.version() != put.version() {
			t.Errorf("written on %s, read on %s: %q, version %s; want version %s", n.ID, next.ID, get.body, get.version(), put.version())
		}
		web.must(t, 200, "PUT", next.url()+key, "")
		if get := web.must(t, 200, "GET", n.url()+key, ""); get.body != "" || get.version() == put.version() {
			t.Errorf("after a second PUT: %q, version %s", get.body, get.version())
		}
		web.must(t, 204, "DELETE", n.url()+key, "")
		web.must(t, 404, "GET", next.url()+key, "")
		web.must(t, 404, "DELETE", next.url()+key, "")
	}
	odd := "/kv/" + url.PathEscape("/../ ?#%\x00é")
	web.must(t, 201, "PUT", c.Nodes()[0].url()+odd, "odd")
	if get := web.must(t, 200, "GET", c.Nodes()[1].url()+odd, ""); get.body != "odd" {
		t.Errorf("an odd key: %q", get.body)
	}
	web.must(t, 413, "PUT", c.Nodes()[0].url()+"/kv/large", strings.Repeat("v", maxValueBytes+1))
	web.must(t, 201, "PUT", c.Nodes()[0].url()+"/kv/large", strings.Repeat("v", maxValueBytes))
	if get := web.must(t, 200, "GET", c.Nodes()[2].url()+"/kv/large", ""); len(get.body) != maxValueBytes {
		t.Errorf("the largest value came back with %d bytes", len(get.body))
	}
}

func compareAndSet(t *testing.T, c *Cluster, web *client) {
	a, b := c.Nodes()[0].url()+"/kv/cas", c.Nodes()[1].url()+"/kv/cas"
	web.must(t, 412, "PUT", a, "x", "If-Match: *")
	first := web.must(t, 201, "PUT", a, "1", "If-None-Match: *")
	if r := web.must(t, 412, "PUT", b, "2", "If-None-Match: *"); r.version() != first.version() {
		t.Errorf("the conflict names version %s, want %s", r.version(), first.version())
	}
	second := web.must(t, 200, "PUT", b, "2", "If-Match: "+first.version())
	if r := web.must(t, 412, "PUT", a, "3", "If-Match: "+first.version()); r.version() != second.version() {
		t.Errorf("the conflict names version %s, want %s", r.version(), second.version())
	}
	if r := web.must(t, 200, "GET", a, ""); r.body != "2" || r.version() != second.version() {
		t.Errorf("after the conflict: %q, version %s", r.body, r.version())
	}
	web.must(t, 412, "DELETE", a, "", "If-Match: "+first.version())
	web.must(t, 204, "DELETE", a, "", "If-Match: "+strings.Trim(second.version(), `"`))
	web.must(t, 412, "PUT", a, "4", "If-Match: "+second.version())
}

func statusPage(t *testing.T, c *Cluster, web *client) {
	for _, n := range c.Nodes() {
		r := web.must(t, 200, "GET", n.url()+"/", "")
		if !strings.Contains(r.body, "<title>") || r.header.Get("Content-Security-Policy") == "" {
			t.Errorf("the page of %s has no title or no policy", n.ID)
		}
		for _, external := range []string{"src=\"http", "href=\"http", "@import", "url(http"} {
			if strings.Contains(r.body, external) {
				t.Errorf("the page loads something: %s", external)
			}
		}
		web.must(t, 404, "GET", n.url()+"/nonsense", "")
	}
	web.must(t, 201, "PUT", c.Nodes()[0].url()+"/nodes/b/kv/page", "shown")
	if r := web.must(t, 201, "POST", c.Nodes()[0].url()+"/nodes/b/kv/page/sum?add=1", ""); r.body != "1\n" {
		t.Errorf("the page's addition is answered %q", r.body)
	}
	web.must(t, 200, "GET", c.Nodes()[0].url()+"/nodes/c/kv/page?consistency=lease", "")
	web.must(t, 204, "DELETE", c.Nodes()[0].url()+"/nodes/c/kv/page/sum", "")
	web.must(t, 400, "GET", c.Nodes()[0].url()+"/nodes/c/kv/?watch=1&after=x", "")
	eventually(t, "the status to show one leader and the key", func() bool {
		s, err := web.status(c.Nodes()[1].url())
		if err != nil {
			t.Fatal(err)
		}
		leaders := 0
		for _, n := range s.Nodes {
			if n.Role == "Leader" {
				leaders++
			}
			if !n.Here || !n.Running || n.Term == 0 || n.HTTP == "" || len(s.Spans[n.ID]) == 0 {
				t.Fatalf("node %s: %+v, spans %v", n.ID, n, s.Spans[n.ID])
			}
		}
		return s.Self == "b" && s.Control && len(s.Nodes) == 3 && leaders == 1 && len(s.Records) > 0 &&
			len(s.Keys) > 0 && s.Keys[0].Key == "page" && s.Keys[0].Value == "shown"
	})
}

func buttons(t *testing.T, c *Cluster, web *client) {
	base := c.Nodes()[0].url()
	running := func(id string) bool {
		s, err := web.status(base)
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range s.Nodes {
			if string(n.ID) == id {
				return n.Running
			}
		}
		t.Fatalf("no node %s in the status", id)
		return false
	}
	web.must(t, 403, "POST", base+"/nodes/c/kill", "", "Origin: http://elsewhere.example")
	web.must(t, 403, "POST", base+"/nodes", "", "Origin: http://elsewhere.example")
	web.must(t, 404, "POST", base+"/nodes/d/kill", "")
	web.must(t, 404, "POST", base+"/nodes/c/explode", "")
	web.must(t, 409, "POST", base+"/nodes/c/restart", "")
	web.must(t, 204, "POST", base+"/nodes/c/kill", "")
	web.must(t, 409, "POST", base+"/nodes/c/kill", "")
	if s, err := web.status(base); err != nil || s.Nodes[2].Error != "" {
		t.Errorf("c, which was killed, is shown with error %q (%v)", s.Nodes[2].Error, err)
	}
	if running("c") {
		t.Error("c runs after it was killed")
	}
	if _, err := web.try("GET", c.Nodes()[2].url()+"/", ""); err == nil {
		t.Error("the port of a killed node answers")
	}
	if r := web.must(t, 503, "PUT", base+"/nodes/c/kv/x", "through a dead node"); r.header.Get("Retry-After") == "" {
		t.Error("503 without Retry-After")
	}
	eventually(t, "the other two to take a write", func() bool { // c may have led
		r, err := web.try("PUT", base+"/kv/while-c-is-dead", "yes")
		return err == nil && r.code < 300
	})
	web.must(t, 204, "POST", base+"/nodes/c/restart", "")
	if r := web.must(t, 200, "GET", c.Nodes()[2].url()+"/kv/while-c-is-dead", ""); r.body != "yes" {
		t.Errorf("c answers %q after its restart", r.body)
	}
}

// A leader that is cut off takes a write and can't commit it: its outcome is
// unknown. Soon it knows that it leads nobody, and refuses writes, which is a
// better answer. The others go on, and after the healing all agree.
func TestPartitionedLeader(t *testing.T) {
	checkLeaks(t)
	web := newClient(t)
	c := startCluster(t, t.TempDir(), freePorts(t, 6), 300*time.Millisecond)
	var old, other *Node
	eventually(t, "a leader to take a write while it is cut off", func() bool {
		old = c.leader(t)
		other = c.Nodes()[0]
		if other == old {
			other = c.Nodes()[1]
		}
		web.must(t, 204, "POST", other.url()+"/nodes/"+string(old.ID)+"/partition", "")
		r, err := web.try("PUT", old.url()+"/kv/cut", "lost")
		if err != nil {
			t.Fatal(err)
		}
		if r.code == http.StatusGatewayTimeout {
			if !strings.Contains(r.body, "outcome is unknown") {
				t.Errorf("504 says %q", r.body)
			}
			return true
		}
		// This machine was so slow that the leader had already resigned.
		web.must(t, 204, "POST", other.url()+"/nodes/"+string(old.ID)+"/heal", "")
		return false
	})
	eventually(t, "the majority to go on", func() bool {
		r, err := web.try("PUT", other.url()+"/kv/majority", "goes on")
		return err == nil && r.code < 300 // 200 if an attempt that was answered 504 was committed after all
	})
	eventually(t, "the leader that is cut off to refuse writes", func() bool {
		r, err := web.try("PUT", old.url()+"/kv/cut2", "x")
		if err != nil {
			t.Fatal(err)
		}
		return r.code == 503 && r.header.Get("Retry-After") != ""
	})
	web.must(t, 204, "POST", other.url()+"/nodes/"+string(old.ID)+"/heal", "")
	eventually(t, "the healed node to answer", func() bool {
		r, err := web.try("GET", old.url()+"/kv/majority", "")
		return err == nil && r.code == 200 && r.body == "goes on"
	})
	web.must(t, 404, "GET", other.url()+"/kv/cut", "") // another leader's entry took its place
}

// The leader is killed under load. Whatever was acknowledged is there after
// all nodes were stopped and started again on their directories.
func TestKillLeaderUnderLoad(t *testing.T) {
	checkLeaks(t)
	dir, ports := t.TempDir(), freePorts(t, 6)
	c := startCluster(t, dir, ports, requestTimeout)
	leader := c.leader(t)
	urls := []string{c.Nodes()[0].url(), c.Nodes()[1].url(), c.Nodes()[2].url()}
	l := startLoad(t, urls...)
	l.waitFor(t, 100)
	killed := time.Now()
	if err := leader.Kill(); err != nil {
		t.Fatal(err)
	}
	l.waitFor(t, 100)
	if err := leader.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	l.waitFor(t, 100)
	l.stop()
	t.Logf("%d writes acknowledged, none for %v when the leader was killed", len(l.acked), l.longestGap(killed).Round(time.Millisecond))
	if err := c.Stop(); err != nil {
		t.Fatal(err)
	}
	again := startCluster(t, dir, ports, requestTimeout)
	again.leader(t)
	l.check(t, urls...)
}
